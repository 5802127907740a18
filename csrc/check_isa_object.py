"""Fail if an object of one instruction set emits a weak symbol outside its own namespace (called by CMake)."""

import subprocess
import sys

nm, isa, *objects = sys.argv[1:]
for path in objects:
    listing = subprocess.run([nm, "-C", "--defined-only", path], check=True, capture_output=True, text=True).stdout
    leaks = [line for line in listing.splitlines() if line[17:18] == "W" and f"cpu::{isa}::" not in line]
    if leaks:
        sys.exit(f"{path} emits {len(leaks)} functions that other objects share:\n" + "\n".join(leaks))
