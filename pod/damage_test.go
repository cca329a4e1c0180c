package pod

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
)

// damages are what can become of a file, each under its name.
func damages() map[string]func(path string) error {
	write := func(content func(old []byte) []byte) func(string) error {
		return func(path string) error {
			old, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(path, content(old), 0o600)
		}
	}
	return map[string]func(string) error{
		"truncated": write(func(old []byte) []byte { return old[:len(old)/2] }),
		"empty":     write(func([]byte) []byte { return nil }),
		"noise":     write(func([]byte) []byte { return []byte("\x00\xff{]noise") }),
		"newer":     write(func([]byte) []byte { return []byte(`{"version":99,"record":{"new":[1]}}`) }),
		"other":     write(func([]byte) []byte { return []byte(`{"version":1,"record":null}`) }),
		"missing":   os.Remove,
		"directory": func(path string) error {
			return errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path, "inside"), 0o700))
		},
		"a temporary directory beside it": func(path string) error {
			return errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path+tempSuffix, "inside"), 0o700))
		},
		"unreadable": func(path string) error { return os.Chmod(path, 0) },
	}
}

func saveJSON(path string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(path, raw, 0o600)
}
