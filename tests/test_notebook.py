"""The notebook, executed from top to bottom on a checkpoint of this machine; and what of it is committed."""

import base64
import io
import json
import re

import pytest
import torch
from PIL import Image

import models_mae
from tests.helpers import ROOT

NOTEBOOK = ROOT / "demo" / "mae_visualize.ipynb"


def pictures(notebook) -> list[list[Image.Image]]:
    """The pictures of each code cell."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = [[output["data"] for output in cell["outputs"] if "data" in output] for cell in cells]
    return [
        [Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) for data in cell if "image/png" in data]
        for cell in shown
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "n_images"),
    [("mae_vit_tiny_patch4", {}, 3), ("mae_vit_tiny_patch16", {"norm_pix_loss": True}, 3)],
    ids=["digits", "photographs, normalised pixels"],
)
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, name, options, n_images):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    torch.manual_seed(0)
    model = models_mae.MODELS[name](**options)
    args = {"model": name, "input_size": model.patch_embed.img_size[0], **options}
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "checkpoint-0.pth")
    monkeypatch.setenv("MAE_CHECKPOINT", str(tmp_path / "checkpoint-0.pth"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for a core would spin
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing downloaded"))

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where).execute()

    counts = [len(cell) for cell in pictures(notebook)]
    assert counts[4:6] == [1, 2], "one sheet; one for each seed"
    assert counts[7:] == [1, 2 if options else 0, 1], "a mask of one's own; two kinds of statistics; attention"
    sheet = pictures(notebook)[4][0]
    assert sheet.width == 4 * 134 + 6 and sheet.height > n_images * 128
    assert len(sheet.convert("L").getcolors()) > 100
    assert not (tmp_path / "nothing downloaded").exists()


def test_the_committed_notebook_shows_small_pictures_and_no_path_of_its_author():
    text = NOTEBOOK.read_text()
    assert len(text) < 300_000
    notebook = json.loads(text)
    assert sum(map(len, pictures(notebook))) == 5
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "top to bottom, once"
    words = "".join(
        "".join(cell["source"]) + json.dumps([o.get("text") for o in cell.get("outputs", [])]) for cell in cells
    )
    assert not re.search(r"/(tmp|home|root|work)/", words)
