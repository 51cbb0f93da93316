"""Run each script named in the arguments with -h, and import each module. Print as JSON what each
printed and which modules were loaded afterward. Fail if one starts a process group.
"""

import contextlib
import importlib
import io
import json
import runpy
import sys

if __name__ == "__main__":
    results = {}
    for name in sys.argv[1:]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if name.endswith(".py"):
                sys.argv = [name, "-h"]
                try:
                    runpy.run_path(name, run_name="__main__")
                except SystemExit as exit_:
                    if exit_.code:
                        raise
            else:
                importlib.import_module(name)
        results[name] = printed.getvalue(), sorted(sys.modules)
    if sys.modules["torch.distributed"].is_initialized():
        raise RuntimeError("importing started a process group")
    print(json.dumps(results))
