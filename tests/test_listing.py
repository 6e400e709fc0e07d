"""The `list` verb: groups, descriptions, speed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmtrain.__main__ import main
from mmtrain.listing import configs_dir, describe, table


def test_groups_and_descriptions(tmp_path: Path) -> None:
    (tmp_path / "run_a.yaml").write_text("# First run\n# more\nmodel: 1\n")
    (tmp_path / "b.yaml").write_text("\n#   Layer: smaller batches  \n")
    (tmp_path / "plain.yaml").write_text("model: 1\n# too late\n")
    text = table(tmp_path)
    runs, layers = text.split("\n\n")
    assert "  run_a  First run" in runs
    assert runs.splitlines()[-1] == "  run_a  First run" and "  plain" in runs
    assert layers.splitlines()[1] == "  b      smaller batches"
    assert describe(tmp_path / "plain.yaml") == ""


def test_shipped_configs_all_describe_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for path in configs_dir().glob("*.yaml"):
        assert describe(path), f"{path.name} needs a first comment line"
        assert path.stem in shown


def test_listing_imports_nothing_heavy() -> None:
    """So it answers in a moment: 0.08 s where importing torch alone takes seconds."""
    code = "import sys; from mmtrain.__main__ import main; rc = main(['list']); " + (
        "print(sorted({'torch', 'lightning', 'yaml', 'numpy'} & set(sys.modules)), rc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"


def test_bad_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "a", "b"]) == 2
    assert "usage" in capsys.readouterr().err
