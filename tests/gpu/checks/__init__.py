"""The checks of the first run on a GPU; `python -m checks MODULE NAME REPORT DEVICE FOLDER` runs one of them."""
