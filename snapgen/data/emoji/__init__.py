"""The embedded data set: captioned emoji as webdataset shards; see README.md beside this file."""
