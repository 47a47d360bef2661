"""Importers: write one shard per institution of a source, side by side in one folder.

read_npz(file)            an .npz pack in the layout of fedgan or MedMNIST
read_folder(folder)       class folders: SOURCE/class/*.png, or SOURCE/train/class/*.png
read_manifest(file)       a CSV: path, label column(s), patient, institution, split
import_source(source, output, options)
"""

from fedgan.data.importers.folder import read_folder
from fedgan.data.importers.manifest import Columns, read_manifest
from fedgan.data.importers.npz import read_npz
from fedgan.data.importers.source import ImportOptions, Skipped, Source, import_source

__all__ = [
    "Columns",
    "ImportOptions",
    "Skipped",
    "Source",
    "import_source",
    "read_folder",
    "read_manifest",
    "read_npz",
]
