// Command health answers the gRPC health protocol on port 9090, as a pod whose probes speak it. The service "late" is
// not serving for its first two seconds, the service "early" after its first three.
package main

import (
	"log"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
)

func main() {
	listener, err := net.Listen("tcp", ":9090")
	if err != nil {
		log.Fatal(err)
	}
	server, state := grpc.NewServer(), health.NewServer()
	state.SetServingStatus("late", healthv1.HealthCheckResponse_NOT_SERVING)
	state.SetServingStatus("early", healthv1.HealthCheckResponse_SERVING)
	time.AfterFunc(2*time.Second, func() { state.SetServingStatus("late", healthv1.HealthCheckResponse_SERVING) })
	time.AfterFunc(3*time.Second, func() { state.SetServingStatus("early", healthv1.HealthCheckResponse_NOT_SERVING) })
	healthv1.RegisterHealthServer(server, state)
	log.Fatal(server.Serve(listener))
}
