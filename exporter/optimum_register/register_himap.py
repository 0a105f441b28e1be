"""Installed as `optimum/commands/register/register_himap.py`, where optimum-cli looks for commands of others."""

from optimum.commands.export.base import ExportCommand

from himap_export.exporter.optimum_command import HimapExportCommand

REGISTER_COMMANDS = [(HimapExportCommand, ExportCommand)]
