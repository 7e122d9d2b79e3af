"""The demo of references: what the base does not draw, the adapter reads off the reference, and off nothing else."""

import pytest

from rankfold.apps.cli import main
from rankfold.apps.cli.demo_edit import DemoEditConfig, run_demo_edit
from rankfold.training.embedded.demo_edit import is_edit_data, write_edit_data


def test_it_knows_its_own_data(capsys, tmp_path):
    assert not is_edit_data(tmp_path)
    rows = write_edit_data(tmp_path / "data", seed=0, rows=2, test=2)
    assert is_edit_data(tmp_path / "data")
    assert [row.prompt.split()[1] for row in rows] == ["thing", "creature"]
    (tmp_path / "data" / "targets" / "mine.png").write_bytes(b"mine")
    assert not is_edit_data(tmp_path / "data")
    with pytest.raises(SystemExit):
        main(["demo", "edit", "--out", str(tmp_path), "--overwrite"])
    assert "holds files that no demo has written" in capsys.readouterr().err
    assert (tmp_path / "data" / "targets" / "mine.png").is_file()


@pytest.mark.slow
def test_the_reference_is_followed(tmp_path, capsys):
    figures = run_demo_edit(DemoEditConfig(out=tmp_path / "demo", pairs=200, steps=150, test=12))
    assert "another's reference" in capsys.readouterr().out
    own = {name: {key: value["mean"] for key, value in shares.items()} for name, shares in figures.items()}
    assert own["after"]["PSNR, dB"] > own["before"]["PSNR, dB"] + 3
    assert own["after"]["own target nearest"] >= 0.9
    assert own["after"]["colour"] >= own["before"]["colour"] + 0.3
    assert own["after, another's reference"]["own target nearest"] <= 0.2
