import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "tiny")]
