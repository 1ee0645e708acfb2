"""Print the versions that a bug report needs: ``python -m soft_mm``."""

import importlib.util
import platform
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version

import torch

from .version import __version__

PACKAGES = ('torchvision', 'mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg', 'numpy', 'cv2')


def versions() -> Iterator[tuple[str, str]]:
    """List the versions of soft_mm and of what it runs on.

    Yields:
        tuple[str, str]: Name and version. A package that several distributions provide, a fault of the
        installation, has all of them.
    """
    yield 'soft_mm', __version__
    yield 'python', f'{platform.python_version()}, {platform.platform()}'
    yield 'torch', torch.__version__
    yield 'CUDA', torch.version.cuda or 'not in this build of torch'
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield 'GPUs', ', '.join(torch.cuda.get_device_name(index) for index in range(count)) or 'none'
    providers = packages_distributions()
    for name in PACKAGES:
        found = [f'{version(provider)} ({provider})' for provider in sorted(set(providers.get(name, ())))]
        unknown = 'unknown' if importlib.util.find_spec(name) else 'not installed'
        yield name, ', '.join(found) or unknown


if __name__ == '__main__':
    for name, text in versions():
        print(f'{name:12} {text}')
