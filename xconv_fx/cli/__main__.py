"""`python -m xconv_fx.cli`, for environments whose scripts are not on the path."""

from __future__ import annotations

import sys

from . import main

sys.exit(main())
