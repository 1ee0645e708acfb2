import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


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
    install_requires=['torch>=2.0'],
    extras_require={
        'original': ORIGINAL,
        'maintained': MAINTAINED,
        'photo-digits': ['scikit-learn', 'scikit-image', 'pycocotools', 'rich'],
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
