import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
# openmim looks for configs and tools here in an installed package.
MIM = Path('soft_mm', '.mim')
CARRIED = ('configs', 'tools', 'model-index.yml')


class BuildWithConfigs(build_py):
    """Add configs and tools to the package: as links for an editable installation, as copies otherwise."""

    def run(self):
        super().run()
        if self.editable_mode:
            carry(HERE / MIM, link)
        else:
            carry(Path(self.build_lib, MIM), copy)

    def get_outputs(self, include_bytecode=True):
        files = (file for name in CARRIED for file in (HERE / name, *(HERE / name).rglob('*')) if file.is_file())
        carried = [file for file in files if '__pycache__' not in file.parts]
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
        shutil.copytree(source, target, ignore=shutil.ignore_patterns('__pycache__'))
    else:
        shutil.copy2(source, target)


def link(source, target):
    try:
        target.symlink_to(os.path.relpath(source, target.parent))
    except OSError:
        # Windows requires a privilege for links. Copies become outdated until the next installation.
        copy(source, target)


def read_version():
    """Return the version without importing the package, which needs torch."""
    text = (HERE / 'soft_mm' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE).group(1)


def read_description():
    readme = HERE / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.is_file() else ''


# Each toolbox exists as two distributions with the same import name. To require one could overwrite the
# other in the user's environment. The package therefore requires neither. Each extra installs all packages
# of one family.
ORIGINAL = [
    'mmengine>=0.8.0',
    # mmdet and mmsegmentation raise an error at import with mmcv 2.2, but do not declare this to pip.
    'mmcv>=2.0.0,<2.2.0',
    'mmpretrain>=1.0.0',
    'mmdet>=3.0.0',
    'mmsegmentation>=1.0.0',
    # mmsegmentation imports these but does not declare them.
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
    package_data={'soft_mm': ['py.typed']},
    cmdclass=dict(build_py=BuildWithConfigs),
    install_requires=['torch>=2.0'],
    extras_require={
        'original': ORIGINAL,
        'maintained': MAINTAINED,
        'photo-digits': ['scikit-learn', 'scikit-image', 'pycocotools', 'rich', 'jinja2'],
        'safetensors': ['safetensors'],
        'export': ['onnx', 'onnxscript', 'onnxruntime'],
        'dev': ['pytest', 'pytest-xdist', 'ruff', 'pre-commit'],
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
