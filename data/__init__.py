"""Data sets as pair folders: pairs.py reads and writes them, NAME/prepare.py makes them from raw data."""
