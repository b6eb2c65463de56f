"""One script a question; each prints a table and its last line is one JSON object."""

import os

# Before torch is loaded, as in the command line: waiting threads that spin stall each other where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
