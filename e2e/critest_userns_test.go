package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// critest has six specs on user namespaces of pods, and runs none of them where Status does not say that there are
// such. Five of them need none: mode NODE, and four requests that every runtime has to refuse. So that these are held
// against a runtime that tells the truth, they are run once more, through a proxy that changes this one answer.
const (
	usernsSpecs  = "UserNamespaces"
	usernsReason = `^no runtime handler found which supports user namespaces$`
)

// refusals runs the specs of usernsSpecs that critest skipped in v, and files them by how they went.
func (n *node) refusals(v *verdict) {
	n.t.Helper()
	left := regexp.MustCompile(usernsReason)
	skipped := 0
	for _, s := range v.skipped {
		if left.MatchString(s.reason) {
			skipped++
		}
	}
	if skipped == 0 {
		return
	}
	claims := n.path("run", "claims.sock")
	p, err := startClaims(strings.TrimPrefix(n.endpoint, "unix://"), claims)
	if err != nil {
		n.t.Fatal(err)
	}
	defer p.close()
	report := n.critest(critestRun{name: "critest-userns", endpoint: "unix://" + claims, focus: usernsSpecs})
	again := judge(suiteReport{SpecReports: ofContext(report.SpecReports, usernsSpecs)}, nil,
		[]*regexp.Regexp{regexp.MustCompile(`^ID mapping is not supported with path`)})
	if len(again.passed)+len(again.failed)+len(again.skipped) != skipped {
		n.t.Errorf("of %d specs on user namespaces %d have passed, %d failed and %d were skipped",
			skipped, len(again.passed), len(again.failed), len(again.skipped))
	}
	var others []skip
	for _, s := range v.skipped {
		if !left.MatchString(s.reason) {
			others = append(others, s)
		}
	}
	v.passed, v.failed, v.skipped = append(v.passed, again.passed...), append(v.failed, again.failed...), append(others, again.skipped...)
	v.notes = append(v.notes, fmt.Sprintf("the %d specs on user namespaces were run by themselves, with a Status that says there are such for pods", skipped))
}

// ofContext selects specs by a text around them.
func ofContext(all []specReport, text string) (out []specReport) {
	for _, s := range all {
		if strings.Contains(s.name(), text) {
			out = append(out, s)
		}
	}
	return out
}

// claims is a CRI endpoint that passes everything on as it is, but for the handlers' features in Status.
type claims struct {
	server *grpc.Server
	to     *grpc.ClientConn
	served chan struct{}
}

func startClaims(target, socket string) (*claims, error) {
	to, err := grpc.NewClient("unix://"+target, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{})))
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, errors.Join(err, to.Close())
	}
	c := &claims{to: to, served: make(chan struct{})}
	c.server = grpc.NewServer(grpc.ForceServerCodec(rawCodec{}), grpc.UnknownServiceHandler(c.forward))
	go func() {
		defer close(c.served)
		_ = c.server.Serve(l) // ends with Stop
	}()
	return c, nil
}

func (c *claims) close() {
	c.server.Stop()
	<-c.served
	_ = c.to.Close() // nothing is under way
}

// forward carries one call of one request, as all of the CRI are.
func (c *claims) forward(_ any, in grpc.ServerStream) error {
	method, ok := grpc.MethodFromServerStream(in)
	if !ok {
		return status.Error(codes.Internal, "a call without a method")
	}
	header, _ := metadata.FromIncomingContext(in.Context())
	ctx, cancel := context.WithCancel(metadata.NewOutgoingContext(in.Context(), header))
	defer cancel()
	out, err := c.to.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
	if err != nil {
		return err
	}
	var request []byte
	if err := in.RecvMsg(&request); err != nil {
		return err
	}
	if err := errors.Join(out.SendMsg(&request), out.CloseSend()); err != nil {
		return err
	}
	for {
		var answer []byte
		if err := out.RecvMsg(&answer); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if method == runtimeapi.RuntimeService_Status_FullMethodName {
			if answer, err = claim(answer); err != nil {
				return err
			}
		}
		if err := in.SendMsg(&answer); err != nil {
			return err
		}
	}
}

// claim says of every handler that its pods can have user namespaces.
func claim(answer []byte) ([]byte, error) {
	resp := &runtimeapi.StatusResponse{}
	if err := proto.Unmarshal(answer, resp); err != nil {
		return nil, err
	}
	for _, h := range resp.RuntimeHandlers {
		if h.Features == nil {
			h.Features = &runtimeapi.RuntimeHandlerFeatures{}
		}
		h.Features.UserNamespaces = true
	}
	return proto.Marshal(resp)
}

// rawCodec passes messages as the bytes that they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }
func (rawCodec) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = data
	return nil
}
func (rawCodec) Name() string { return "proto" }

// TestClaim: only the one answer is changed.
func TestClaim(t *testing.T) {
	before := &runtimeapi.StatusResponse{RuntimeHandlers: []*runtimeapi.RuntimeHandler{{}, {Name: "x", Features: &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: true}}},
		Info: map[string]string{"config": "{}"}}
	raw, err := proto.Marshal(before)
	if err != nil {
		t.Fatal(err)
	}
	if raw, err = claim(raw); err != nil {
		t.Fatal(err)
	}
	after := &runtimeapi.StatusResponse{}
	if err := proto.Unmarshal(raw, after); err != nil {
		t.Fatal(err)
	}
	for i, h := range after.RuntimeHandlers {
		if !h.Features.UserNamespaces {
			t.Errorf("handler %q: %v", h.Name, h.Features)
		}
		h.Features.UserNamespaces = false
		if before.RuntimeHandlers[i].Features == nil {
			h.Features = nil
		}
	}
	if !proto.Equal(before, after) {
		t.Errorf("%v has become %v", before, after)
	}
}
