"""One script a question; each prints a table and its last line is one JSON object."""

from llmdoctor.threads import spin_briefly

# As in the command line.
spin_briefly()
