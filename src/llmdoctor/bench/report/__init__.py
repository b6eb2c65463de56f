"""The results of a comparison as one HTML page, and as pictures for the docs."""
