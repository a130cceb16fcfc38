"""`python -m decoding` is the command `decoding`."""

import sys

from decoding.cli import main

sys.exit(main())
