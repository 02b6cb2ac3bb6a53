"""Embedded data set of captioned emoji as webdataset shards; see README.md beside this file."""
