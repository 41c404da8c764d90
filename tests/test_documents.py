"""The documents: every command parses, every link, path, module and test that they name is there."""

import argparse
import importlib.util
import pkgutil
import re
import runpy
import shlex
import string
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PAGES = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "demo/README.md"]
)
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
ABSENT_AS_YET = {
    name for name in ("CONTRIBUTING.md", "experiments", "docs/EXPERIMENTS.md") if not (ROOT / name).exists()
}


def blocks(page: str, language: str = "bash") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT[page], re.MULTILINE | re.DOTALL)


def in_line(page: str) -> list[str]:
    """What stands in `backticks` outside of blocks."""
    prose = re.sub(r"^```.*?^```", "", TEXT[page], flags=re.MULTILINE | re.DOTALL)
    return [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]


def commands(page: str) -> list[str]:
    """Lines of bash blocks, continued ones joined and variables filled in, and commands in the prose."""
    found, variables = [], {}
    for line in "\n".join(blocks(page)).replace("\\\n", " ").splitlines():
        line = string.Template(line).safe_substitute(variables)
        words = shlex.split(line, comments=True)
        if words and all(re.match(r"\w+=", word) for word in words):
            variables |= dict(word.split("=", 1) for word in words)
        elif words:
            found.append(line)
    found += [code for code in in_line(page) if re.match(r"(python3?|torchrun|srun|make) ", code)]
    return [line for line in found if re.search(r"\bpython3? |\.py\b|^make |\.sbatch\b", line)]


def words_of(command: str) -> list[str]:
    """A command's words up to what follows it, without what stands for more options; N is a number."""
    words = shlex.split(command, comments=True)
    ends = [i for i, word in enumerate(words) if word in ("&&", "||", "|", ";")]
    words = words[: ends[0]] if ends else words
    return ["1" if word == "N" else word for word in words if word not in ("…", "...")]


class ParsedError(Exception):
    """Raised once the options are read, before any work."""


def check(command: str, monkeypatch) -> None:
    """Raises where a script, module or target is not there, or its options do not parse."""
    words = words_of(command)
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)
        return
    for i, word in enumerate(words):
        if word.endswith(".sbatch"):  # what stands behind it are options of the script that it runs
            words = [re.search(r"^run (main_\w+\.py)", (ROOT / word).read_text(), re.MULTILINE)[1], *words[i + 1 :]]
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    modules = [i + 2 for i in range(len(words) - 2) if re.match(r"(.*/)?python3?$", words[i]) and words[i + 1] == "-m"]
    if not scripts and not modules:
        return
    at = modules[0] if modules else scripts[0]
    name, options = words[at], words[at + 1 :]
    if name.split(".")[0] in ABSENT_AS_YET:
        return
    assert importlib.util.find_spec(name) if modules else (ROOT / name).is_file(), f"{name} is not there"
    if not any(option.startswith("--") for option in options) or "pytest" in words:
        return
    if modules and not (ROOT / name.split(".")[0]).is_dir():  # another's
        return
    monkeypatch.setattr(sys, "argv", [name, *options])
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(parser, *args, **kwargs):
        parse(parser, *args, **kwargs)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
    with pytest.raises(ParsedError):
        if modules:
            runpy.run_module(name, run_name="__main__")
        else:
            runpy.run_path(str(ROOT / name), run_name="__main__")


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, monkeypatch, capsys):
    for command in commands(page):
        with monkeypatch.context() as patch:
            try:
                check(command, patch)
            except SystemExit:
                pytest.fail(f"{command}\n{capsys.readouterr().err[-500:]}")
            except AssertionError as error:
                raise AssertionError(f"{command}: {error}") from error


@pytest.mark.parametrize(
    "command",
    [
        "python main_pretrain.py --data_path x --no_such_option 3",
        "torchrun --nproc_per_node=2 main_finetune.py --model mae_vit_base_patch16",
        "python -m util.export x --to nowhere",
        "srun python submitit_pretrain.py --nodes none",
        "python -m util.exports x",
        "python main_train.py",
        "make coffee",
        "OUT=/shared sbatch --nodes=2 docs/cluster/finetune.sbatch --norm_pix_loss",
    ],
)
def test_a_wrong_command_is_found(command, monkeypatch):
    with pytest.raises((SystemExit, AssertionError)):
        check(command, monkeypatch)


def test_commands_are_found_and_are_many():
    found = {page: len(commands(page)) for page in PAGES}
    assert found["README.md"] > 8 and found["docs/README.md"] > 12 and found["FINETUNE.md"] >= 8, found
    assert "mae_vit_base_patch16" in " ".join(commands("PRETRAIN.md")), "variables are filled in"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_scripts_that_bash_and_python_read(page):
    for block in blocks(page):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{block}"
    for block in blocks(page, "python"):
        compile(block, page, "exec")


def anchors(page: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        name = str(path.resolve().relative_to(ROOT))
        if name in ABSENT_AS_YET:
            continue
        assert path.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(name), f"{page}: {link} has no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_files_and_modules_that_a_page_names_are_there(page):
    for code in in_line(page):
        if re.fullmatch(r"(util|tests|demo|benchmarks|docs)/[\w./]+\.\w+|\w+\.py", code):
            places = [ROOT, ROOT / "tests", ROOT / "demo", (ROOT / page).parent]
            assert any((place / code).exists() for place in places), f"{page}: {code}"
        if name := re.match(r"(util|models_mae|models_vit|main_\w+)(\.\w+)+(?=\(|$)", code):
            if name[0].endswith(".py") or name[0].startswith(("util.misc", "util.datasets")):  # of the original
                continue
            pkgutil.resolve_name(name[0])


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_page_names_are_there(page):
    names = {
        path.name: re.findall(r"^def (test_\w+)", path.read_text(), re.M)
        for path in Path(__file__).parent.glob("test_*.py")
    }
    every = [name for file in names.values() for name in file]
    for code in in_line(page):
        if "::" in code:
            file, name = code.split("::")
            start, whole = re.sub(r"(…|\[).*", "", name), not re.search("[…[]", name)
            assert any(start == test if whole else test.startswith(start) for test in names[file]), f"{page}: {code}"
        elif re.fullmatch(r"…[\w]+…?", code):
            assert any(code.strip("…") in test for test in every), f"{page}: {code}"


def test_readme_gives_what_is_needed_by_line_30_and_is_short():
    lines = TEXT["README.md"].splitlines()
    top = "\n".join(lines[:30])
    assert len(lines) <= 200
    for need in ("docs/reconstructions.png", "pip install", "main_pretrain.py", "main_finetune.py", "main_evaluate.py"):
        assert need in top
