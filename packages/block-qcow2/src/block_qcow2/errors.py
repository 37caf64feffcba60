"""The exception tree of block-qcow2. Every message is one line that names the file or structure and what was expected.

Requests on a channel do not raise: they finish with a negative errno, because a failing disk is an answer to a guest.
"""

from __future__ import annotations


class BlockError(Exception):
    """Anything that this package reports. The base class of every other error in it."""


class OpenError(BlockError):
    """The file cannot be opened, is of the wrong kind, or cannot be used with the options given."""


class ImageInUseError(BlockError):
    """Another process holds a lock on the image that excludes what was asked."""


class EngineError(BlockError):
    """This host does not offer the asynchronous engine that was asked for; the message names it and the reason."""


class ImageFormatError(BlockError):
    """The image breaks its format: the message names the structure, its offset and what was expected."""


class UnsupportedFeatureError(ImageFormatError):
    """The image needs a feature, or an optional dependency, that is not there; the message names it."""


class ExternalFileError(UnsupportedFeatureError):
    """The image names another file, which the caller has not allowed it to open; the message names both."""


class PassphraseNeededError(UnsupportedFeatureError, OpenError):
    """The image is encrypted, and was opened without its passphrase."""


class ImageReadOnlyError(BlockError):
    """A change was asked of an image that is open for reading."""


class ImageCorruptError(ImageFormatError):
    """Metadata was found wrong while the image was in use. Further writes are refused."""
