"""Options as people meet them: --help in the order of need, --config FILE, and the table of what differs."""

import argparse
import contextlib
import difflib
import os
import re
import shlex
import sys
from pathlib import Path

import yaml

from util.errors import shown
from util.log import log

# --help shows these, of each script those that it has, in this order; the rest is for --help_all
NEEDED = (
    "data_path job_dir resume imagenet imagenet_real imagenet_v2 imagenet_a imagenet_r imagenet_sketch imagenet_c set "
    "config finetune output_dir log_dir report_to model input_size nb_classes global_pool cls_token mask_ratio "
    "norm_pix_loss batch_size accum_iter epochs warmup_epochs blr weight_decay layer_decay drop_path mixup cutmix eval "
    "dist_eval ngpus nodes timeout partition device num_workers amp seed save_every help help_all"
).split()
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")  # YAML's words, in any case


def default_text(value: object) -> str:
    """A value as --help and the table of differences show it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value in (None, "") else str(value)


class _Help(argparse.HelpFormatter):
    """Appends each option's default to its help text."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is argparse.SUPPRESS or "(default" in action.help:
            return action.help
        return f"{action.help} (default: {default_text(action.default)})"


class _Parser(argparse.ArgumentParser):
    """Its help is in the order of NEEDED; `source`, if any, says in errors where a bad value stands."""

    source = ""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's takes -1e-3 for an option

    def error(self, message: str):
        super().error(self.source + message)

    def format_usage(self) -> str:
        return f"usage: {self.prog} [options]; --help and --help_all list them\n"

    def format_help(self, everything: bool = False) -> str:
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage("%(prog)s [options]", [], [])
        formatter.add_text(self.description)
        known = self._option_string_actions
        needed = [known[f"--{name}"] for name in NEEDED if f"--{name}" in known]
        groups = [(group.title, group._group_actions) for group in self._action_groups]
        if not needed:
            everything = True
        rest = [(title, [action for action in actions if action not in needed]) for title, actions in groups]
        for title, actions in [("what most runs need", needed), *(rest if everything else ())]:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        if not everything:
            more = sum(action.help is not argparse.SUPPRESS for _, actions in rest for action in actions)
            formatter.add_text(f"--help_all lists {more} more.")
        return formatter.format_help()


class _Show(argparse.Action):
    """--help, and --help_all, of which `const` is True."""

    def __call__(self, parser, namespace, values, option_string=None):
        sys.stdout.write(parser.format_help(self.const))
        parser.exit()


def parse(script_parser: argparse.ArgumentParser, description: str) -> argparse.Namespace:
    """Read the command line, and the file of --config, with `script_parser`, which is made with add_help=False.

    The file's values come first, as if they stood at the front of the command line, which therefore wins.
    """
    prog = script_parser.prog if script_parser.prog.startswith("python ") else None  # else the script's name
    parser = _Parser(prog, parents=[script_parser], description=description, formatter_class=_Help, add_help=False)
    own = set(parser._option_string_actions)
    hidden = {"action": _Show, "nargs": 0, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument("-h", "--help", const=False, help="show what most runs need, and leave", **hidden)
    parser.add_argument("--help_all", const=True, help="show all options, and leave", **hidden)
    parser.add_argument("--config", default="", metavar="FILE",
        help="YAML file of options, such as the config.yaml that each run leaves in output_dir; the command line wins "
        "over it")  # fmt: skip
    for action in [*parser._actions]:  # a flag of the file has an opposite on the command line
        if isinstance(action, argparse._StoreTrueAction) and not _opposites(parser, action):
            parser.add_argument(f"--no_{action.dest}", action="store_false", dest=action.dest,
                default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # fmt: skip
    args = parser.parse_args()
    if args.config:
        parser.source = f"--config {args.config}: "
        words = _words(parser, own, _read(parser, args.config), args)
        parser.parse_args(words)  # alone, so that its errors are told from those of the command line
        parser.source = ""
        args = parser.parse_args([*words, *sys.argv[1:]])
    del args.config
    for name, value in vars(args).items():
        if value in ([], ()):  # what argparse makes of --name=--
            parser.error(f"argument --{name}: expected a value, got '--'")
    return args


class _Plain(yaml.SafeLoader):
    """Leaves scalars as their text, but for null: 1e-3, off and 010 mean what they mean on a command line. A key that
    stands twice is an error.
    """

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] == "tag:yaml.org,2002:null"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read(path: str | Path) -> dict[str, object]:
    """A YAML file -> names and values of options: text, None for null, lists. Raises ValueError in words, OSError."""
    with open(os.path.expanduser(path), encoding="utf-8") as file:
        try:
            values = yaml.load(file, Loader=_Plain)  # a SafeLoader: data, never code
        except (yaml.YAMLError, UnicodeError, RecursionError, ValueError) as error:
            raise ValueError(f"is no YAML: {' '.join(str(error).split())[:300]}") from error
    if values is not None and not isinstance(values, dict):
        raise ValueError("is to have lines such as `epochs: 100`")
    return values or {}


def _read(parser: _Parser, path: str) -> dict[str, object]:
    try:
        return read(path)
    except OSError as error:
        parser.error(f"cannot be read ({error.strerror})")
    except ValueError as error:
        parser.error(str(error))


def _words(parser: _Parser, own: set[str], values: dict, args: argparse.Namespace) -> list[str]:
    """A file's values -> the same as words of a command line. `args`: what the command line gives."""
    names = sorted(option.removeprefix("--") for option in own)
    unknown = []
    for key in (key for key in values if key not in names):
        near = difflib.get_close_matches(str(key).strip("-").replace("-", "_").lower(), names, n=1)
        unknown.append(shown(key) + (f" (nearest: {near[0]})" if near else ""))
    if unknown:
        parser.error(f"no option is named {', '.join(sorted(unknown))}; --help_all lists them")
    words, seen = [], {}
    for key, value in values.items():
        action = parser._option_string_actions[f"--{key}"]
        if (other := seen.setdefault(action.dest, key)) != key:
            parser.error(f"{other} and {key} are one option: keep one of them")
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, list | dict) for item in items):
            parser.error(f"argument --{key}: expected a value, got {shown(value)}")
        if value is None:
            if vars(parser.parse_args([]))[action.dest] is not None:
                parser.error(f"argument --{key}: expected a value, got null")
        elif None in items:
            parser.error(f"argument --{key}: expected values, got null among them")
        elif isinstance(action, argparse._AppendAction):
            if getattr(args, action.dest) == action.default:  # else the command line has its own
                words += [f"--{key}={item}" for item in items]
        elif action.nargs == 0:
            words += _flag(parser, action, key, items)
        elif action.nargs is None:
            if isinstance(value, list):
                parser.error(f"argument --{key}: expected one value, got {shown(value)}")
            if value or value != action.default:  # '' may be no choice, as for --model of main_evaluate.py
                words.append(f"--{key}={value}")
        elif isinstance(action.nargs, int) and len(items) != action.nargs:
            parser.error(f"argument --{key}: expected {action.nargs} values, got {shown(value)}")
        elif options := [item for item in items if item.startswith("--")]:  # would be one of the command line
            parser.error(f"argument --{key}: {shown(options[0])} is no value")
        else:
            words += [f"--{key}", *items]
    return words


def _flag(parser: _Parser, action: argparse.Action, key: str, items: list) -> list[str]:
    """The word for a flag, or that for its opposite; none where leaving it out is its opposite."""
    text = str(items[0]).lower() if len(items) == 1 else ""
    if text in TRUE:
        return [f"--{key}"]
    if text not in FALSE:
        parser.error(f"argument --{key}: expected true or false, got {shown(items[0] if len(items) == 1 else items)}")
    others = _opposites(parser, action)
    return others[0].option_strings[:1] if others else []


def _opposites(parser: _Parser, action: argparse.Action) -> list[argparse.Action]:
    return [a for a in parser._actions if a.dest == action.dest and a.nargs == 0 and a.const != action.const]


# what was asked for


def plain(args: argparse.Namespace) -> dict[str, object]:
    """Options as a dict of what JSON and a checkpoint may hold: paths become text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def table(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The command line, and below it the options whose value is not the parser's default."""
    defaults = vars(parser.parse_args([]))
    rows = [
        (f"--{name}", default_text(value), default_text(defaults[name]) if name in defaults else "-")
        for name, value in vars(args).items()
        if name not in defaults or value != defaults[name]
    ]
    lines = [f"command: {shlex.join(sys.argv)}"]
    if rows:
        rows.insert(0, ("option", "value", "default"))
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines += [f"  {name:<{first}}  {value:<{second}}  {default}" for name, value, default in rows]
    return "\n".join(lines)


def write(args: argparse.Namespace, folder: str | Path, leave_out: set[str] = frozenset()) -> None:
    """All options to `folder`/config.yaml, from which --config starts the same run again; but those of `leave_out`.

    A file of other options that lies there is kept as config-1.yaml, config-2.yaml and so on. A disk that takes no file
    stops no run: the error is in the log.
    """
    path, values = Path(folder) / "config.yaml", {}
    for name, value in plain(args).items():
        if name not in leave_out:
            pairs = isinstance(value, list) and all(isinstance(item, tuple) for item in value)  # of NAME=FOLDER
            values[name] = ["=".join(map(str, pair)) for pair in value] if pairs else value
            values[name] = list(value) if isinstance(value, tuple) else values[name]
    text = (
        "# --config FILE starts this run again; what the command line says besides wins.\n"
        f"# Paths are as seen from {ascii(str(Path.cwd()))[1:-1]}\n"
        + yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=1000)
    )
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        if path.exists():
            old = None
            with contextlib.suppress(ValueError):
                old = read(path)
            if old == read(temporary):
                return
            n = next(n for n in range(1, 10**6) if not path.with_name(f"config-{n}.yaml").exists())
            path.rename(path.with_name(f"config-{n}.yaml"))
            log.info(f"{path}: the options differ from those of the start before, which are in config-{n}.yaml now")
        temporary.replace(path)
    except (OSError, ValueError) as error:
        log.error(f"{path} CANNOT BE WRITTEN ({error})")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
