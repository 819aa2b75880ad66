"""Where things are in the checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"  # homes that earlier versions made
REFERENCE = ROOT / "tests" / "reference"  # numbers of other programs
