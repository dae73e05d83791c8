"""Every code block of README.md does what it shows."""

import importlib.util
import pathlib
import re
import shlex

from jaxquant.__main__ import main

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""


def blocks(*languages: str) -> list[tuple[int, str]]:
    """The fenced blocks in one of some languages, each with the line its first line has in README.md."""
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [(README[: f.start(2)].count("\n") + 1, f[2]) for f in fences if f[1] in languages]


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert blocks("python")
    namespace = {"__name__": "__readme__"}
    for line, source in blocks("python"):
        exec(compile("\n" * (line - 1) + source, ROOT / "README.md", "exec"), namespace)


def test_no_block_escapes():
    """A block in a language that no test here knows would be shown untested."""
    assert len(re.findall(r"^```", README, re.MULTILINE)) == 2 * len(blocks("python", "bash", "text"))


def test_shell_blocks_name_real_targets_and_modules():
    shell = "\n".join(source for _, source in blocks("bash"))
    targets = re.findall(r"\bmake ([a-z]+)", shell)
    assert {"quickstart", "test"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
    modules = re.findall(r"python -m ([\w.]+)", shell)
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_jaxquant_commands_run_in_order(tmp_path, monkeypatch):
    lines = [line for _, source in blocks("bash") for line in source.splitlines() if line.startswith("jaxquant ")]
    assert lines
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    assert [line for line in lines if main(shlex.split(line, comments=True)[1:]) != 0] == []


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert links
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []
