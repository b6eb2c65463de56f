"""The methods that guided decoding is compared with, one a file, all behind the engine's interface."""
