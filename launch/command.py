"""What all commands share: their flags, the configuration that `--config=NAME[:VARIANT]` names, and exit codes.

A command file defines its flags, then `def main(config: Config) -> None` (or `def main() -> None` if it needs no configuration), and
ends in `command.run(main)`. Each command keeps its flags in a `FlagValues` of its own, so that tests can run several in one process.

Exit codes: 0 for success; 2 for a `RequestError`, 1 for an error of the operating system (a full disk, a file that may not be read) and
for a training that is no longer finite, 130 for Ctrl-C, each printed as one line on stderr; 1 for anything else, with its traceback.
"""

import difflib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import fields, is_dataclass
from io import StringIO
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro
from absl import app, flags, logging

from configs import named
from configs.errors import RequestError, require
from configs.run import RunConfig
from omnitransfer_jax.folders.refusals import is_full, refused

MARKERS = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)  # a field has one type; booleans are given as True or False
WRONG_REQUEST, SYSTEM_ERROR, INTERRUPTED = 2, 1, 130  # exit codes


def run(main: Callable[..., None], flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Runs a command as a process; it never returns."""

    def parse(argv: list[str]) -> list[str]:
        flags.FLAGS.mark_as_parsed()  # `execute` reads them
        return argv[1:]

    def body(argv: list[str]) -> int:
        logging.set_verbosity(logging.WARNING)  # absl's default is INFO, at which Orbax logs every file
        threading.excepthook = _of_thread
        logging.get_absl_logger().addFilter(lambda record: not record.exc_info)  # Orbax's threads log the errors that they then raise
        code = execute(main, flag_values, argv)
        if code in (SYSTEM_ERROR, INTERRUPTED):  # threads and exit handlers would report the same once more, with tracebacks
            with suppress(OSError):
                sys.stdout.flush()
            os._exit(code)
        return code

    app.run(body, flags_parser=parse)


def execute(main: Callable[..., None], flag_values: flags.FlagValues, argv: Sequence[str]) -> int:
    """Runs a command in this process and returns its exit code; errors that are neither a request's nor the system's are raised."""
    try:
        kinds = _config_types(main)
        if kinds and "config" not in flag_values:
            accepted = f"NAME[:VARIANT] of {', '.join(named.names(kinds))}"
            flags.DEFINE_string("config", None, accepted, required=True, flag_values=flag_values)
        if {"--help", "-h", "-help"} & set(argv):
            _print_help(main, flag_values, kinds)
            return 0
        rest = _parse_flags(flag_values, argv)
        if not kinds:
            override(None, rest, flag_values)
            main()
        else:
            config = override(load_config(str(flag_values["config"].value), kinds), rest, flag_values)
            config.validate()
            main(config)
        sys.stdout.flush()
    except RequestError as error:
        return _end(WRONG_REQUEST, str(error))
    except KeyboardInterrupt:
        return _end(INTERRUPTED, "interrupted; what was finished is whole, and the same command goes on or begins again")
    except FloatingPointError as error:  # a run whose updates are no longer finite
        return _end(SYSTEM_ERROR, str(error))
    except Exception as error:
        if message := _system_message(error):
            return _end(SYSTEM_ERROR, message)
        raise
    return 0


def _end(code: int, message: str) -> int:
    print(" ".join(message.split()), file=sys.stderr, flush=True)
    return code


def _of_thread(args: threading.ExceptHookArgs) -> None:
    """Reports the error that ended a thread as that of a command is reported."""
    if message := _system_message(args.exc_value):
        _end(SYSTEM_ERROR, message)
    else:
        threading.__excepthook__(args)


def _system_message(error: BaseException | None) -> str:
    """What the operating system refused, if that is why `error` was raised; empty if it is not."""
    refusal = refused(error)
    return f"{refusal}; what was finished is whole: free some space and give the same command again" if is_full(refusal) else refusal


def load_config(name: str, of: tuple[type, ...] = (RunConfig,)) -> Any:
    """The configuration `NAME[:VARIANT]` of configs/NAME.py; one of another type than `of` is a `RequestError`."""
    module, _, variant = name.partition(":")
    known, accepted = named.names(), named.names(of)
    require(module in known, f"--config={name}: no such configuration{_nearest(module, accepted)}; there are {', '.join(accepted)}")
    require(module in accepted, f"--config={name}: the configuration of another command; take {', '.join(accepted)}")
    return named.module_of(module).get_config(variant)


def _config_types(main: Callable[..., None]) -> tuple[type, ...]:
    """The configurations of which a command takes one; empty if it takes none."""
    parameters = list(inspect.signature(main).parameters)
    hint = get_type_hints(main)[parameters[0]] if parameters else None
    return get_args(hint) or ((hint,) if hint else ())


def _parse_flags(flag_values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Reads the command's own flags from `argv` and returns the other arguments."""
    flag_values.unparse_flags()
    try:
        return flag_values(["", *argv], known_only=True)[1:]
    except (flags.Error, ValueError) as error:
        required = [name for name in flag_values if flag_values[name].validators and flag_values[name].value is None]
        absent = [f"--{name} ({flag_values[name].help})" for name in required]
        raise RequestError(f"{', '.join(absent)}: not given, and this command needs it" if absent else str(error)) from None


def override(config: Any, args: Sequence[str], flag_values: Iterable[str] = ()) -> Any:
    """`config` with the fields set that `args` name, as `--a.b=value` or `--a.b value`; a command without one takes no fields.

    `flag_values` are the flags that a misspelt name may mean.
    """
    options: list[list[str]] = []
    for arg in args:
        if arg.startswith("--"):
            options.append([arg])
        elif options:
            options[-1].append(arg)
        else:
            raise RequestError(f"{arg}: not a flag; flags are given as --name=value")
    types = {} if config is None else _field_types(config)
    for option in options:
        name, _, value = option[0].removeprefix("--").partition("=")
        if (name := name.replace("-", "_")) not in types:
            what = "flag" if config is None else "flag or configuration field"
            raise RequestError(f"--{name}: no such {what}{_nearest(name, [*flag_values, *types], '--')}; --help lists all")
        try:
            with redirect_stderr(
                StringIO()
            ):  # where a value has the wrong type, tyro 1.0.17 prints a page in spite of console_outputs=False
                config = tyro.cli(type(config), default=config, args=option, config=MARKERS)
        except SystemExit:
            values = " ".join(filter(None, [value, *option[1:]]))
            raise RequestError(f"--{name}={values}: expected {_expected(types[name])}") from None
    return config


def _field_types(config: Any, prefix: str = "") -> dict[str, Any]:
    """The type of every field of a configuration by its dotted name."""
    hints, found = get_type_hints(type(config)), {}
    for field in fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        found |= _field_types(value, f"{name}.") if is_dataclass(value) else {name: hints[field.name]}
    return found


def _expected(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        kinds = ", ".join("..." if arg is Ellipsis else arg.__name__ for arg in get_args(hint))
        return f"values of ({kinds}), separated by blanks"
    return str(hint) if get_args(hint) else hint.__name__


def _nearest(name: str, known: Sequence[str], dashes: str = "") -> str:
    """The end of a message that names what was probably meant: the same last word in another place, else a similar spelling."""
    same = [candidate for candidate in known if candidate.rpartition(".")[2] == name.rpartition(".")[2]]
    close = same or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {dashes}{close[0]}?" if close else ""


def _print_help(main: Callable[..., None], flag_values: flags.FlagValues, kinds: Sequence[type]) -> None:
    """The command's docstring, its flags, and every field of the configuration with its docstring."""
    module = sys.modules[main.__module__]
    print((module.__doc__ or "").strip())
    print("\nFlags:")
    by_module = flag_values.flags_by_module_dict()  # absl knows the module that was started by its path
    for flag in (flag for name in (sys.argv[0], main.__module__, __name__) for flag in by_module.get(name, [])):
        default = "required" if flag.validators else f"default {flag.default}" if flag.default is not None else "optional"
        print(f"  --{flag.name}  {flag.help} ({default})")
    for kind in kinds[:1]:
        print(f"\nFields of the configuration, as the full size of {kind.__module__} has them:", flush=True)
        try:
            tyro.cli(kind, default=kind(), args=["--help"], config=MARKERS, use_underscores=True, prog="", description="")
        except SystemExit:
            return
