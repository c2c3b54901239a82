"""Runs a command and prints its wall time, CPU time, peak memory and output as one JSON line.

Standard library only, started with ``python -I -S``, so that the launcher itself stays small.
"""

import json
import resource
import subprocess
import sys
import time

began = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True, check=False)
wall = time.perf_counter() - began
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(
    json.dumps(
        {
            "wall": wall,
            "cpu": usage.ru_utime + usage.ru_stime,
            "peak_rss": usage.ru_maxrss * 1024,
            "returncode": done.returncode,
            "stdout": done.stdout,
            "stderr": done.stderr,
        }
    )
)
