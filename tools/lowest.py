"""Print ``name==version``, pip constraints, for the lowest version of every direct dependency that setup.cfg allows.

``lowest.py EXTRA...`` takes the dependencies of these extras too, and the markers for the Python that runs it.
"""

import configparser
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

setup = configparser.ConfigParser()
setup.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
texts = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in sys.argv[1:])]
floors: dict[str, Version] = {}
for requirement in map(Requirement, filter(None, "\n".join(texts).splitlines())):
    if requirement.marker is None or requirement.marker.evaluate():
        lowest = [Version(one.version) for one in requirement.specifier if one.operator in (">=", "==")]
        if not lowest:
            sys.exit(f"setup.cfg: {requirement.name} needs a lowest version that is tested: {requirement.name} >=...")
        floors[requirement.name] = max(*lowest, floors.get(requirement.name, Version("0")))
print("\n".join(f"{name}=={version}" for name, version in floors.items()))
