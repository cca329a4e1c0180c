package main

// registriesHelp documents the one structured section of the file.
const registriesHelp = `registries
    how registries are reached; file only. Keys are registry hosts as image names have them:

      registries:
        docker.io:
          mirrors: ["http://127.0.0.1:5000"]   # tried in order before the registry itself
        registry.example.com:5000:
          caFile: /home/me/ca.pem               # trust this authority for its certificate
        registry.example.org:
          insecure: true                        # plain HTTP, or a certificate that nothing vouches for: for this
                                                # host and port, not for a token server or storage elsewhere
        "*":                                    # every registry that has no section here
          mirrors: ["https://mirror.example.com"]   # told by ?ns=docker.io and so on which one is meant

    A mirror never gets the credentials of the registry that it stands for. The registry itself is asked after its
    mirrors, for what none of them has.
`
