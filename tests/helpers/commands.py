"""Commands that are expected to fail."""

import pytest

from rankfold.apps.cli import main


def expect_error(capsys, *words):
    """Runs a command that must fail; returns its one sentence."""
    with pytest.raises(SystemExit) as error:
        main([str(word) for word in words])
    assert error.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert "Traceback" not in message
    return message
