"""Sources of photo-digits: photographs and digit scans inside installed packages."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from soft_mm.ops.checks import check_choice

CLASSES = ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
#: RGB colour of each class, in the format of the toolboxes' visualizers.
PALETTE = (
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (250, 190, 212),
)
SPLITS = ('train', 'val')
NUM_VAL_SCANS = 397


@dataclass(frozen=True)
class Photograph:
    """Photograph inside an installed package, with its licence.

    Attributes:
        name: Name of the photograph.
        split: ``'train'`` or ``'val'``.
        package: Package that contains it.
        file: Path of the file inside the package.
        licence: Licence or legal status.
        credit: Author, with an address where one is known.
    """

    name: str
    split: str
    package: str
    file: str
    licence: str
    credit: str


def _skimage(name, split, file, licence, credit):
    return Photograph(name, split, 'skimage', f'data/{file}', licence, credit)


def _sklearn(name, split, file, licence, credit):
    return Photograph(name, split, 'sklearn', f'datasets/images/{file}', licence, credit)


#: All photographs. The docstrings of ``skimage.data`` and scikit-learn's ``datasets/images/README.txt`` state their
#: licences. The pictures moon, page and stereo_motorcycle are excluded because no licence is stated, and the picture
#: text because it shows handwriting.
PHOTOGRAPHS = (
    _skimage('astronaut', 'train', 'astronaut.png', 'public domain', 'NASA, https://flic.kr/p/r9qvLn'),
    _skimage('brick', 'train', 'brick.png', 'CC0', 'CC0Textures, Bricks25'),
    _skimage('camera', 'train', 'camera.png', 'CC0', 'Lav Varshney'),
    _skimage('chelsea', 'train', 'chelsea.png', 'CC0', 'Stefan van der Walt'),
    _sklearn(
        'china',
        'train',
        'china.jpg',
        'CC BY 2.0',
        'danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035',
    ),
    _skimage('clock', 'train', 'clock_motion.png', 'public domain', 'Stefan van der Walt'),
    _skimage(
        'coins',
        'train',
        'coins.png',
        'no known copyright restrictions',
        'Brooklyn Museum, https://www.brooklynmuseum.org/opencollection/archives/image/51611',
    ),
    _skimage(
        'grass',
        'train',
        'grass.png',
        'CC0',
        'linolafett, https://www.deviantart.com/linolafett/art/Grass-01-434853879',
    ),
    _skimage(
        'hubble_deep_field',
        'train',
        'hubble_deep_field.jpg',
        'public domain',
        'NASA, http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/',
    ),
    _skimage(
        'immunohistochemistry',
        'train',
        'ihc.png',
        'no known copyright restrictions',
        'Center for Microscopy And Molecular Imaging (CMMI)',
    ),
    _skimage(
        'retina',
        'train',
        'retina.jpg',
        'CC0',
        'Mikael Häggström, https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg',
    ),
    _skimage('coffee', 'val', 'coffee.png', 'CC0', 'Rachel Michetti, Pikolo Espresso Bar'),
    _sklearn(
        'flower',
        'val',
        'flower.jpg',
        'CC BY 2.0',
        'vultilion, https://www.flickr.com/photos/vultilion/6056698931',
    ),
    _skimage('gravel', 'val', 'gravel.png', 'CC0', 'CC0Textures, Gravel04'),
    _skimage(
        'rocket',
        'val',
        'rocket.jpg',
        'public domain',
        'SpaceX, https://www.flickr.com/photos/spacexphotos/16511594820/',
    ),
)


@cache
def load_photographs(split):
    """Read the photographs of a split, and cache them for the process.

    The files are read directly from the installed packages, because the functions of ``skimage.data`` would download
    missing files.

    Args:
        split (str): ``'train'`` or ``'val'``.

    Returns:
        tuple[np.ndarray]: Photographs (H, W, 3) uint8, BGR. The three channels of a grey photograph are equal.

    Raises:
        ImportError: If scikit-image or scikit-learn is not installed.
        FileNotFoundError: If the installed release does not contain a picture.
        ValueError: If the split is unknown.
    """
    check_choice('split', split, SPLITS)
    images = []
    for photograph in PHOTOGRAPHS:
        if photograph.split != split:
            continue
        package = _import_source(photograph.package)
        path = Path(package.__file__).parent / photograph.file
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:
            raise FileNotFoundError(
                f'{path} is missing: {photograph.package} {package.__version__} does not contain it; install another '
                f'release of {photograph.package}'
            )
        image.setflags(write=False)
        images.append(image)
    return tuple(images)


@cache
def load_scans(split):
    """Read the digit scans of a split, and cache them for the process.

    The split is stratified by class and does not depend on the seed of a generator.

    Args:
        split (str): ``'train'`` (1400 scans) or ``'val'`` (397 scans).

    Returns:
        tuple[np.ndarray]: Scans (N, 8, 8) float32, each scaled to a maximum of 1, and labels (N,) int64.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If the split is unknown.
    """
    check_choice('split', split, SPLITS)
    sklearn = _import_source('sklearn')
    digits = sklearn.datasets.load_digits()
    parts = sklearn.model_selection.train_test_split(
        np.arange(len(digits.target)),
        test_size=NUM_VAL_SCANS,
        stratify=digits.target,
        random_state=0,
    )
    chosen = parts[SPLITS.index(split)]
    scans = digits.images[chosen].astype(np.float32)
    scans /= scans.max(axis=(1, 2), keepdims=True)
    labels = digits.target[chosen].astype(np.int64)
    scans.setflags(write=False)
    labels.setflags(write=False)
    return scans, labels


def _import_source(package):
    try:
        if package == 'skimage':
            import skimage

            return skimage
        import sklearn.datasets
        import sklearn.model_selection

        return sklearn
    except ImportError as error:
        raise ImportError(
            f'photo-digits needs the data inside scikit-learn and scikit-image, but {package} cannot be imported; run '
            "in the repository root: pip install -e '.[photo-digits]'"
        ) from error
