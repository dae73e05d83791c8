"""The names that `import jaxquant` gives."""

import pkgutil
import types

import jaxquant


def test_no_public_name_hides_a_module():
    modules = [found.name for found in pkgutil.iter_modules(jaxquant.__path__)]
    assert "conversion" in modules
    hidden = {name for name in modules if not isinstance(getattr(jaxquant, name, jaxquant), types.ModuleType)}
    assert hidden == set()


def test_checkpoints_are_at_the_top():
    names = ("convert", "diff", "export", "from_qwix", "inspect", "load_huggingface", "save_huggingface", "to_qwix")
    assert all(isinstance(getattr(jaxquant, name), types.FunctionType) for name in names)
