"""Commands of rankfold, one after another in one process, since starting one takes longer than a short run: each_of.py JSON."""

import json
import sys

from rankfold.apps.cli import main

for words in json.loads(sys.argv[1]):
    main(words)
