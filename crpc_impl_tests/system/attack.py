#!/usr/bin/python3
"""The quick form of `make attack`: each attack once, judged by limits that a busy machine does not
reach. bench/attack/attack.py says what is required. The last line is "N passed, N failed".

crpc-test-timeout: 200
"""
import os
import sys

import _build

ATTACK = os.path.join(_build.ROOT, "bench", "attack", "attack.py")
os.execv(sys.executable, [sys.executable, ATTACK, "--quick", "--build",
                          os.path.join(_build.BUILD, "bench"), *sys.argv[1:]])
