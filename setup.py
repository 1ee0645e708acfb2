import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
# Where openmim looks for them within an installed package.
MIM = Path('soft_mm', '.mim')
CARRIED = ('configs', 'tools', 'model-index.yml')
# Tools that work on the repository.
LEFT_OUT = (
    '__pycache__',
    'setup_env.py',
    'make_model_zoo.py',
    'demo.py',
    'compare_attention.py',
    'compare_landmarks.py',
)


class BuildWithConfigs(build_py):
    """Puts configs and tools into the package: copies of them, or links where the package is installed editable."""

    def run(self):
        super().run()
        if self.editable_mode:
            carry(HERE / MIM, link)
        else:
            carry(Path(self.build_lib, MIM), copy)

    def get_outputs(self, include_bytecode=True):
        files = (file for name in CARRIED for file in (HERE / name, *(HERE / name).rglob('*')) if file.is_file())
        carried = [file for file in files if not set(file.parts) & set(LEFT_OUT)]
        return [
            *super().get_outputs(include_bytecode),
            *(str(Path(self.build_lib, MIM, file.relative_to(HERE))) for file in carried),
        ]


def carry(folder, put):
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for name in CARRIED:
        put(HERE / name, folder / name)


def copy(source, target):
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
    else:
        shutil.copy2(source, target)


def link(source, target):
    try:
        target.symlink_to(os.path.relpath(source, target.parent))
    except OSError:
        # Windows asks for a privilege. The copies are as old as the last installation.
        copy(source, target)


def read_version():
    """Reads the version without importing the package, which needs torch."""
    text = (HERE / 'soft_mm' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE).group(1)


def read_description():
    readme = HERE / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.is_file() else ''


# Every toolbox exists as two distributions that provide the same import package, so requiring one
# would install it over the other where the user holds that. The package therefore requires neither,
# and an extra names a whole stack of one family.
ORIGINAL = [
    'mmengine>=0.8.0',
    # mmdet and mmsegmentation refuse to be imported beside 2.2, and do not tell pip.
    'mmcv>=2.0.0,<2.2.0',
    'mmpretrain>=1.0.0',
    'mmdet>=3.0.0',
    'mmsegmentation>=1.0.0',
    # imported by mmsegmentation, which does not declare them
    'ftfy',
    'regex',
]
MAINTAINED = [
    'onedl-mmengine>=0.10.8',
    'onedl-mmcv>=2.3.0',
    'onedl-mmpretrain>=1.3.0',
    'onedl-mmdetection>=3.4.0',
    'onedl-mmsegmentation>=1.3.0',
]

setup(
    name='soft_mm',
    version=read_version(),
    description='The SOFT transformer backbone (softmax-free attention) for OpenMMLab toolboxes',
    long_description=read_description(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords='computer vision, transformer, linear attention, image classification, '
    'object detection, semantic segmentation',
    python_requires='>=3.10',
    packages=find_packages(include=['soft_mm', 'soft_mm.*']),
    cmdclass=dict(build_py=BuildWithConfigs),
    install_requires=['torch>=2.0'],
    extras_require={
        'original': ORIGINAL,
        'maintained': MAINTAINED,
        'photo-digits': ['scikit-learn', 'scikit-image', 'pycocotools', 'rich'],
        'safetensors': ['safetensors'],
        'dev': ['pytest', 'ruff', 'pre-commit'],
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
