"""`python -m edit_ray.cli`."""

import sys

from edit_ray.cli.main import main

sys.exit(main())
