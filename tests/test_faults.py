"""A tenth of the faults of tests/faults.py on every day, all of them within ten days.

    python -m tests.faults                              # all of them
    python -m tests.faults --day 2026-11-27             # those of that day again
"""
import datetime
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and looks into /proc")
def test_the_faults_of_the_day():
    day = os.environ.get("TENBIT_FAULTS_DATE") or datetime.date.today().isoformat()
    p = subprocess.run([sys.executable, "-m", "tests.faults", "--day", day], cwd=ROOT, capture_output=True, text=True,
                       encoding="utf-8", errors="replace", timeout=900)
    tried = re.search(r"^all +(\d+) +\1 +0 ", p.stdout, re.M)             # tried, survived, lost
    assert p.returncode == 0 and tried and int(tried[1]) >= 20, p.stdout + p.stderr
