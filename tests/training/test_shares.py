"""FILE=SHARE, as --more-data takes it."""

import pytest

from rankfold.toolkit.core.errors import UserError
from rankfold.training.config.shares import parse_share, split_share


def test_a_share_stands_behind_the_last_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "lr=3.json"
    odd.write_text("[]")
    assert split_share("lr=3.json") == ("lr=3.json", "")
    assert split_share("lr=3.json=2") == ("lr=3.json", "=2")
    assert split_share("gone.json=0.5") == ("gone.json", "=0.5")
    assert parse_share(f"{odd}=0.5") == (odd, 0.5)
    assert parse_share("gone.json")[1] == 1


@pytest.mark.parametrize("share", ["", "0", "-1", "nan", "inf", "half"])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(UserError, match="a number above 0"):
        parse_share(f"rows.json={share}")
