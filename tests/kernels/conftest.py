import sys
from pathlib import Path

from interpreted import INTERPRETED, patch_language_once

sys.path.insert(0, str(Path(__file__).parent))
if INTERPRETED:
    patch_language_once()
