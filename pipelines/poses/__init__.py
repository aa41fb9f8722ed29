"""From work units to poses and figures. Imports nothing here on purpose."""
