from st_clp.cli import main

main()
