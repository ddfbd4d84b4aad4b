"""Which versions of PEFT this package works with, checked before anything of PEFT is imported."""

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

# The hooks that layer.py uses are PEFT's, but experimental: another minor may move them without an error.
PEFT_VERSIONS = ">=0.21,<0.22"
# Of the installed package, not by importing it: another version may fail in that already.
found = version("peft")
if found not in SpecifierSet(PEFT_VERSIONS, prereleases=True):
    raise ImportError(f"vdu_peft needs peft{PEFT_VERSIONS}, found {found}: pip install 'peft{PEFT_VERSIONS}'")
