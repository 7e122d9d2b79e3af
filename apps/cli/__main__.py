"""`python -m rankfold.apps.cli`, which launchers such as accelerate start."""

from . import main

main()
