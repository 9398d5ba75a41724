"""`python -m streamconv`: the command line."""

from __future__ import annotations

import sys

from streamconv.cli import main

sys.exit(main())
