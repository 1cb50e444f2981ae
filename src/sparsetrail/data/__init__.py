"""Image sets as uint8 tensors with their identity, and augmentation as tensor operations; only `get` downloads."""

from sparsetrail.data.augment import crop as crop
from sparsetrail.data.augment import cutout as cutout
from sparsetrail.data.augment import flip as flip
from sparsetrail.data.augment import pixels as pixels
from sparsetrail.data.cache import Entry as Entry
from sparsetrail.data.cache import Import as Import
from sparsetrail.data.cache import add as add
from sparsetrail.data.cache import available as available
from sparsetrail.data.cache import cache_root as cache_root
from sparsetrail.data.cache import load as load
from sparsetrail.data.cache import verify as verify
from sparsetrail.data.fetch import get as get
from sparsetrail.data.sets import KNOWN as KNOWN
from sparsetrail.data.sets import DataError as DataError
from sparsetrail.data.sets import Dataset as Dataset
from sparsetrail.data.sets import content_hash as content_hash
from sparsetrail.data.sets import pick as pick
from sparsetrail.data.sets import split_validation as split_validation
from sparsetrail.data.sets import take as take
