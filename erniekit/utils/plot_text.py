"""Names that users chose, in any script, as text of a plot: matplotlib's own font has no Chinese characters."""

import contextlib
import re
import warnings
from collections.abc import Iterator

from erniekit.utils import log

# Fonts with Chinese characters, as Linux distributions, macOS and Windows have them.
_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Arial Unicode MS",
)


_MISSING = "Glyph .* missing from"  # how matplotlib begins its warnings


@contextlib.contextmanager
def in_any_script() -> Iterator[None]:
    """A context, or decorator, in which plots take characters that their font lacks from another installed one. A log
    line says if none has them; matplotlib would warn about each.
    """
    # Imported late, since matplotlib takes half a second to import.
    import matplotlib
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = [*matplotlib.rcParams["font.family"], *(name for name in _FONTS if name in installed)]
    with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", _MISSING, UserWarning)
        yield
    for warning in caught:
        if re.match(_MISSING, str(warning.message)):
            log.once(
                "plots: no font of this system is known to have all characters of the run's name; they are drawn as "
                f"boxes. Install one, such as {_FONTS[0]}"
            )
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
