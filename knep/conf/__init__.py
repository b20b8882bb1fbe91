"""The YAML of every group: `hydra.searchpath: [pkg://knep.conf]`."""
