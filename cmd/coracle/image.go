package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coracle-cri/coracle/images"
	"github.com/coracle-cri/coracle/rootless"
)

// The CRI has no call to bring an image in from a file, so the daemon takes it on a socket of its own.

func adminSocket(node rootless.Node) string { return filepath.Join(node.RuntimeDir, "admin.sock") }

// adminHandler serves POST /v1/images?ref=NAME with an archive as its body; the answer is the images as JSON, or
// a sentence with a status of 400 or above.
func adminHandler(store *images.Store) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/images", func(w http.ResponseWriter, r *http.Request) {
		imported, err := store.Import(r.Context(), r.Body, r.URL.Query().Get("ref"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(imported) // the client is gone when this fails
	})
	return mux
}

func imageCommand(s *settings) *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "Bring images in without a registry"}
	var ref string
	load := &cobra.Command{
		Use:   "import FILE",
		Short: "Import a docker archive or an OCI layout archive; - reads standard input",
		Example: "  docker save app:dev | coracle image import -\n" +
			"  podman save --format oci-archive app:dev | coracle image import --ref app:dev -",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, node, err := s.load(cmd.Flags())
			if err != nil {
				return err
			}
			in := cmd.InOrStdin()
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			}
			imported, err := importImages(cmd.Context(), node, in, ref)
			for _, image := range imported {
				fmt.Fprintln(cmd.OutOrStdout(), image.ID, strings.Join(image.RepoTags, " "))
			}
			return err
		},
	}
	load.Flags().StringVar(&ref, "ref", "", "name of the image, where the archive does not give one or another is wanted")
	cmd.AddCommand(load)
	return cmd
}

func importImages(ctx context.Context, node rootless.Node, in io.Reader, ref string) ([]images.Image, error) {
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", adminSocket(node))
	}}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://node/v1/images?ref="+url.QueryEscape(ref), in)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("reach node %s (is it up? coracle status%s): %w", node.Name, nameFlag(node), err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		why, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		return nil, errors.New(strings.TrimSpace(string(why)))
	}
	var imported []images.Image
	if err := json.NewDecoder(resp.Body).Decode(&imported); err != nil {
		return nil, fmt.Errorf("read the node's answer: %w", err)
	}
	return imported, nil
}
