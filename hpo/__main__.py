from hpo.cli.main import program

program()
