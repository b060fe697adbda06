"""Package metadata: everything is read from settings.ini, the one place that states it."""
import configparser
import glob
import shlex
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent


def read_settings(path=HERE / "settings.ini"):
    """The DEFAULT section of settings.ini as a mapping."""
    ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
    ini.read(path, encoding="utf-8")
    return ini["DEFAULT"]


def data_files(folder=HERE / "data"):
    """Every file below data/, relative to it: the model, the pictures and the runs go along."""
    paths = (p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file())
    shown = (p for p in paths if not any(part.startswith(".") for part in p.parts))
    return [glob.escape(p.as_posix()) for p in shown]  # setuptools takes them as patterns


cfg = read_settings()
# An editable install finds data/ where it lies. With one package, whose folder is its name, it
# also becomes a plain path: that alone wins over a clone called ivt_min in the folder of a script.
editable = bool({"editable_wheel", "develop"} & set(sys.argv))
files = [] if editable else data_files()
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=" + cfg["min_python"],
    packages=["ivt_min"] + (["ivt_min.data"] if files else []),
    package_dir={"": "."} | ({"ivt_min.data": "data"} if files else {}),
    package_data={"ivt_min.data": files} if files else {},
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={"dev": shlex.split(cfg["dev_requirements"])},
    entry_points={"console_scripts": shlex.split(cfg["console_scripts"])},
    zip_safe=False,
)
