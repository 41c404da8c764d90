"""The notebook, executed from top to bottom on a checkpoint of this machine; and what of it is committed."""

import base64
import http.server
import io
import json
import re
import shutil
import subprocess
import threading

import pytest
import torch
from helpers import ROOT
from PIL import Image

import models_mae

NOTEBOOK = ROOT / "demo" / "mae_visualize.ipynb"


def pictures(notebook) -> list[list[Image.Image]]:
    """The pictures of each code cell."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = [[output["data"] for output in cell["outputs"] if "data" in output] for cell in cells]
    return [
        [Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) for data in cell if "image/png" in data]
        for cell in shown
    ]


def execute(notebook, folder) -> None:
    """Run all cells, as Jupyter does for a notebook in `folder`."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where).execute()


def save_checkpoint(tmp_path, monkeypatch, name, options) -> None:
    """What the notebook shall load: an untrained model."""
    torch.manual_seed(0)
    model = models_mae.MODELS[name](**options)
    args = {"model": name, "input_size": model.patch_embed.img_size[0], **options}
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "checkpoint-0.pth")
    monkeypatch.setenv("MAE_CHECKPOINT", str(tmp_path / "checkpoint-0.pth"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for a core would spin
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing downloaded"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "n_images"),
    [("mae_vit_tiny_patch4", {}, 3), ("mae_vit_tiny_patch16", {"norm_pix_loss": True}, 3)],
    ids=["digits", "photographs, normalised pixels"],
)
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, name, options, n_images):
    nbformat = pytest.importorskip("nbformat")
    save_checkpoint(tmp_path, monkeypatch, name, options)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    execute(notebook, NOTEBOOK.parent)

    counts = [len(cell) for cell in pictures(notebook)]
    assert counts[4:6] == [1, 2], "one sheet; one for each seed"
    assert counts[7:] == [1, 2 if options else 0, 1], "a mask of one's own; two kinds of statistics; attention"
    sheet = pictures(notebook)[4][0]
    assert sheet.width == 4 * 134 + 6 and sheet.height > n_images * 128
    assert len(sheet.convert("L").getcolors()) > 100
    assert not (tmp_path / "nothing downloaded").exists()


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """Makes this machine look like Colab to a notebook that was opened from the address it is called with.

    Returns (the notebook, the folder that Colab starts it in). The address of this project at the host leads to a
    repository made of the files here; nothing is installed from anywhere.
    """
    nbformat = pytest.importorskip("nbformat")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if files.returncode:
        pytest.skip("not a git repository")
    origin = tmp_path / "origin"
    for file in filter(lambda name: (ROOT / name).is_file(), files.stdout.splitlines()):
        (origin / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, origin / file)
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -q -m all"):
        subprocess.run(["git", *command.split()], cwd=origin, check=True)
    variables = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{origin.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/someone/mae",
        "PIP_NO_INDEX": "1",  # what is needed is here
    }

    class Sessions(http.server.BaseHTTPRequestHandler):
        path_of_notebook = ""

        def do_GET(self):
            self.send_response(200 if self.path == "/api/sessions" else 404)
            self.end_headers()
            self.wfile.write(json.dumps([{"name": "a", "path": self.path_of_notebook}]).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sessions)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    variables |= {"COLAB_JUPYTER_IP": "127.0.0.1", "KMP_TARGET_PORT": str(server.server_port)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def open_from(path: str):
        Sessions.path_of_notebook = path
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        in_colab = 'import sys, types; sys.modules["google.colab"] = types.ModuleType("google.colab")'
        notebook.cells.insert(0, nbformat.v4.new_code_cell(in_colab))
        (tmp_path / "content").mkdir()
        return notebook, tmp_path / "content"

    yield open_from
    server.shutdown()


@pytest.mark.slow
def test_in_colab_it_clones_the_repository_that_it_was_opened_from(tmp_path, monkeypatch, colab):
    notebook, content = colab("fileId=https%3A//github.com/someone/mae/blob/main/demo/mae_visualize.ipynb")
    save_checkpoint(tmp_path, monkeypatch, "mae_vit_tiny_patch4", {})
    where = pytest.importorskip("nbformat").v4.new_code_cell('print(sys.modules["models_mae"].__file__)')
    notebook.cells.append(where)
    execute(notebook, content)
    assert where.outputs[0].text.strip() == str(content / "mae" / "models_mae.py")
    assert sum(map(len, pictures(notebook))) == 5


@pytest.mark.parametrize("path", ["fileId=1aB_cD-eF", ""], ids=["a copy in Drive", "nothing said"])
def test_in_colab_a_notebook_of_unknown_origin_asks_for_the_address(colab, path):
    notebook, content = colab(path)
    del notebook.cells[3:]  # after the cell that clones
    with pytest.raises(Exception, match="fill in REPOSITORY above"):
        execute(notebook, content)


def test_in_colab_a_second_start_takes_what_the_first_has_cloned(colab, tmp_path):
    notebook, content = colab("")  # it need not know again where it was opened from
    (content / "mae").symlink_to(tmp_path / "origin")
    del notebook.cells[3:]
    execute(notebook, content)


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
