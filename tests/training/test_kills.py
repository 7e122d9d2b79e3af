"""kill -9 of every kind of job: what goes on ends equal to the bit, and no half file is ever there by its final name."""

import kills
import pytest

from rankfold.toolkit.core.paths import assets_folder

PHOTOS = assets_folder() / "demo" / "creature"


@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_three_hundred_kills():
    found = kills.campaign(220, 0, PHOTOS)
    assert not found.faults, "\n".join(found.faults)
    assert found.counts["kills"] >= 300
    assert found.counts["unequal"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["measured", "text encoder and words"])
def test_a_few_kills(name):
    found = kills.campaign(2, 1, PHOTOS, [name])
    assert not found.faults, "\n".join(found.faults)
